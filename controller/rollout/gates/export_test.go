// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package gates

// Endings is the predicate of the manager's watch, which no caller outside needs.
var Endings = endings
