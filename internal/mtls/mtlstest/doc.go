// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package mtlstest makes certificate authorities and certificates for tests.
package mtlstest
