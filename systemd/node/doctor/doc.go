// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package doctor looks at everything on a node that must be right for kubelet's calls to come
// through cri-proxy and for commands to be carried out, and says what is wrong and what to do. It
// changes nothing, and needs neither the daemon nor the runtime.
package doctor
