// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestCommandLine(t *testing.T) {
	tls := []string{"--tls-cert-file=/none/c", "--tls-key-file=/none/k", "--tls-ca-file=/none/ca"}
	tests := []struct {
		name string
		args []string
		code int
		want string
	}{
		{"version", []string{"--version"}, 0, "cri-controller "},
		{"help names the flags", []string{"--help"}, 0, "--leader-election-namespace"},
		{"no TLS files", nil, 1, "--tls-cert-file, --tls-key-file and --tls-ca-file are all needed"},
		{"an argument", []string{"serve"}, 1, "unknown command"},
		{"log level", append(tls, "--log-level=loud"), 1, "--log-level"},
		{"log format", append(tls, "--log-format=xml"), 1, `--log-format must be text or json, not "xml"`},
		{"workers", append(tls, "--workers=0"), 1, "--workers must be at least 1"},
		{"port", append(tls, "--node-port=70000"), 1, "--node-port must be between 1 and 65535"},
		{"kubeconfig", append(tls, "--kubeconfig=/none/kubeconfig"), 1, "give --kubeconfig outside a pod"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			if code := execute(t.Context(), tt.args, &out, &out); code != tt.code || !strings.Contains(out.String(), tt.want) {
				t.Errorf("code %d, want %d; output:\n%s\nwant %q in it", code, tt.code, out.String(), tt.want)
			}
		})
	}
}
