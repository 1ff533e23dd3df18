// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package controller runs the cluster side of cri-proxy: it wires the reconcilers, the webhooks and
// the certificate authority into one manager.
package controller
