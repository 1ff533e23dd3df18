// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package systemd has the files that a node needs, for cri-proxy install.
package systemd

import (
	"embed"
	"fmt"
)

//go:embed config.yaml crash-guard tmpfiles.conf *.service *.socket
var files embed.FS

// File returns one of the files of this directory.
func File(name string) ([]byte, error) {
	b, err := files.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("not in this binary: %w", err)
	}
	return b, nil
}
