// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package config_test

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/pflag"

	"github.com/cri-proxy/cri-proxy/internal/config"
)

// Flags override the file.
func ExampleConfig_Load() {
	dir, err := os.MkdirTemp("", "config")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(file, []byte("log: {level: debug, format: json}\n"), 0o600); err != nil {
		fmt.Println(err)
		return
	}
	c := config.Default()
	flags := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	c.Flags(flags)
	if err := flags.Parse([]string{"--log-level=warning"}); err != nil {
		fmt.Println(err)
		return
	}
	if err := c.Load(file, flags); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(c.Log.Level, c.Log.Format)
	// Output: warning json
}
