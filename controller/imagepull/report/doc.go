// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package report words the statuses of image jobs: conditions, messages, and the nodes that failed.
// Its functions change a status in memory; the reconcilers write it.
package report
