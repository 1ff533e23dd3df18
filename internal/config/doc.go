// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package config is what `cri-proxy serve` is told: defaults, the YAML file, the
// flags that win over it, and the checks that turn a bad value into advice.
package config
