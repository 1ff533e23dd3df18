// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package swap replaces one container of a pod by another one in the same sandbox: it stages the
// new container, switches over, shows kubelet the result, and undoes what did not work.
//
// A [Container] is the work of one operation on one container. Its parts have a job each:
//
//	Incumbent  the old container: what it was made with, whether it runs, when it has ended
//	Stager     makes the new container, hidden, and removes it
//	Switcher   ends the old container and lets the new one begin, by each method
//	Revealer   shows the new container to kubelet
//	undoer     takes back what is hidden
//
// A [Kind] decides which step comes next, and what kubelet is answered meanwhile: package restart
// for a restart, package imageupdate for an image update. What a step means for the next process is
// in the table of package store.
package swap
