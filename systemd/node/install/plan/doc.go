// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package plan has the actions of an installation. It does them in order and, if one fails, undoes
// them in reverse order.
package plan
