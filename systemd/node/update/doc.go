// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package update replaces the running cri-proxy with another version without a failed call: systemd
// starts a second instance of the unit, which shares the sockets with the first.
package update
