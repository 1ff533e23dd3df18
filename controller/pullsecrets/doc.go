// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package pullsecrets turns imagePullSecrets into the registry credentials that nodes accept.
package pullsecrets
