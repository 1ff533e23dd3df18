// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package list carries out ImageListPullJobs: it creates an ImagePullJob for each image, and counts
// what they say. The name of a child follows from the image and the template, so that no child is
// made twice.
package list
