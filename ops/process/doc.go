// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package process looks at other processes of this machine: who is at the other end of a socket,
// how it was started, and through which proxies it sends its requests.
package process
