// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package spec reads ImagePullJobs and ImageListPullJobs: what a job asks of which nodes, what its
// pulls are called there, which jobs a list consists of, and what the user has to correct. It
// changes nothing and commands no node.
//
// A pull's UID follows from the job alone, so that each controller that takes the job up finds the
// pulls of the one before.
package spec
