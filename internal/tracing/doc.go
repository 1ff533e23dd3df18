// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package tracing sends spans to an OpenTelemetry collector.
package tracing
