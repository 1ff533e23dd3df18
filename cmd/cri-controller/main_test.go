// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"slices"
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
		{"a part of the TLS files", tls[:1], 1, "--tls-cert-file, --tls-key-file and --tls-ca-file are all needed"},
		{"files, and none given", []string{"--identity=files"}, 1,
			"--tls-cert-file, --tls-key-file and --tls-ca-file are all needed"},
		{"files, and not wanted", slices.Concat(tls, []string{"--identity=csr"}), 1,
			"have no effect with --identity=csr"},
		{"identity", []string{"--identity=none"}, 1, `--identity must be csr or files, not "none"`},
		{"life", []string{"--certificate-life=1s"}, 1, "must be at least a minute"},
		{"CA's life", []string{"--ca-life=1h"}, 1, "must be at least ten times"},
		{"an argument", []string{"serve"}, 1, "unknown command"},
		{"log level", slices.Concat(tls, []string{"--log-level=loud"}), 1, "--log-level"},
		{"log format", slices.Concat(tls, []string{"--log-format=xml"}), 1,
			`--log-format must be text or json, not "xml"`},
		{"workers", slices.Concat(tls, []string{"--workers=0"}), 1, "--workers must be at least 1"},
		{"OpenKruise", slices.Concat(tls, []string{"--openkruise-period=1ms"}), 1,
			"--openkruise-period must be at least 1s"},
		{"port", slices.Concat(tls, []string{"--node-port=70000"}), 1, "--node-port must be between 1 and 65535"},
		{"webhook port", slices.Concat(tls, []string{"--webhook-port=70000"}), 1,
			"--webhook-port must be between 0, which switches the webhooks off, and 65535"},
		{"webhooks outside a pod", slices.Concat(tls, []string{"--webhook-port=9443"}), 1,
			"give --webhook-namespace outside a pod"},
		{"webhook certificates too short",
			slices.Concat(tls, []string{"--webhook-port=9443", "--webhook-namespace=x", "--webhook-cert-validity=1s"}),
			1,
			"--webhook-cert-validity must be at least 1m"},
		{"kubeconfig", slices.Concat(tls, []string{"--kubeconfig=/none/kubeconfig"}), 1,
			"give --kubeconfig outside a pod"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			if code := execute(t.Context(), tt.args, &out, &out); code != tt.code ||
				!strings.Contains(out.String(), tt.want) {
				t.Errorf("code %d, want %d; output:\n%s\nwant %q in it", code, tt.code, out.String(), tt.want)
			}
		})
	}
}
