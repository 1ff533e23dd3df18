// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Command cri-controller is the cluster side: it carries out custom resources by
// commanding the cri-proxy of each node.
package main
