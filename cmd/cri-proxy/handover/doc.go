// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package handover is what two processes of cri-proxy on one node say to each other: the one that has the state, and
// the one that is to have it next.
package handover
