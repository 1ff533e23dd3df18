// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package store keeps on disk what must outlive the process: the journal of operations, the image
// overrides and the records of the containers that kubelet has created. It knows what a journal
// record means, but it runs no operation.
package store
