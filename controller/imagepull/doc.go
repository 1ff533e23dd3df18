// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package imagepull carries out ImagePullJobs by commanding the nodes. Its packages read the jobs
// (spec), command the nodes (command), read what they say of their pulls (pull), word the statuses
// (report), and carry out ImageListPullJobs (list).
//
// For each job at work there is a jobState: a table of what is known of each node, and the calls
// that are being made. Only the job's reconcile reads and changes the table. A call leaves what it
// brings in the job's inbox and wakes the reconciler: at once if a node can begin now, else when
// more news have been gathered. A reconcile looks at the nodes of which there is something new, and
// not at all of them; it lists the nodes only after one of them, a pod or the job has changed, and
// makes up a status only when that is worth a write.
//
// A node is probed first: the controller adopts the pulls that the node has for the job, and
// cancels those that the job no longer wants. A node that answers then waits until fewer nodes pull
// than may. A node that does not answer is tried again and holds up nobody. The UID of a pull
// follows from the job alone, so another controller goes on where this one ends, and nodes that are
// done say so from their journal.
//
// Status is written when something has happened that is worth a write: with N nodes at most about
// 20 + 2√N times in the life of a job.
package imagepull
