// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package list

// ChildChanges is which changes of children wake the reconciler. Only SetupWithManager needs it.
var ChildChanges = childChanges
