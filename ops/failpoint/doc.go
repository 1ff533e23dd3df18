// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package failpoint marks points at which a test may end or hold the process. Only builds with the
// tag failpoint have them.
package failpoint
