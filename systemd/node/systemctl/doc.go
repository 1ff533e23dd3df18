// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package systemctl calls the program systemctl, and others of this machine whose words belong into
// the error.
package systemctl
