// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package config

// InvalidError says that the command line or the configuration is wrong: trying
// again will not help. The program exits with 2.
type InvalidError struct{ Err error }

func (e *InvalidError) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *InvalidError) Unwrap() error { return e.Err }

// ExitCode returns 2.
func (*InvalidError) ExitCode() int { return 2 }
