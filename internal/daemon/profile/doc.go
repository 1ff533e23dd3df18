// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package profile takes profiles of this process and sends them over the admin socket.
package profile
