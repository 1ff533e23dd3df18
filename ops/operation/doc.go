// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package operation is one operation of a node in memory: what was commanded, how far it has come,
// and who may still cancel it. What must survive the process goes to the journal before it counts.
// The package does not carry operations out.
package operation
