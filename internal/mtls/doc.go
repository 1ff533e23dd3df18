// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package mtls is the mutual TLS of the ops API: credentials from files that are
// read again when they change, and an allow-list of client names.
package mtls
