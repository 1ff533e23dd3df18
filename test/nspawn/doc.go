// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package nspawn tests the units as systemd runs them: in a machine of its own under
// systemd-nspawn, with stand-ins for containerd and kubelet, and the commands install and uninstall
// with the real ones, in a real cluster. It needs root; the machine's root file system is made
// once, by debootstrap.
package nspawn
