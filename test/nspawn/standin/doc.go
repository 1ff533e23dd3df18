// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Command standin stands in for containerd or kubelet in the machine of package nspawn.
package main
