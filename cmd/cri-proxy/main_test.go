// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRun(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	good := write("good.yaml", "log: {level: debug}\n")
	unknown := write("unknown.yaml", "log:\n  lvel: debug\n")
	invalid := write("invalid.yaml", "listen: {path: relative}\n")
	for _, tt := range []struct {
		name           string
		args           []string
		code           int
		stdout, stderr string // parts
	}{
		{"version", []string{"version"}, 0, "cri-proxy ", ""},
		{"help", []string{"--help"}, 0, "completion", ""},
		{"good file", []string{"config", "check", good}, 0, good + ": ok\n", ""},
		{"unknown key", []string{"config", "check", unknown}, 2, "", "cri-proxy: " + unknown +
			`:2:3: unknown key "log.lvel", did you mean "log.level"?`},
		{"invalid value", []string{"config", "check", invalid}, 2, "",
			invalid + `: listen.path: "relative" is not an absolute path`},
		{"missing file", []string{"config", "check", dir + "/none"}, 2, "", "no such file"},
		{"unknown flag", []string{"serve", "--bogus"}, 2, "", "unknown flag: --bogus; see cri-proxy serve --help"},
		{"unknown flag of ctl", []string{"ctl", "restart", "--bogus"}, 2, "", "see cri-proxy ctl restart --help"},
		{"unknown command", []string{"bogus"}, 2, "", `unknown command "bogus"`},
		{"too many arguments", []string{"serve", "x"}, 2, "", `unknown command "x" for "cri-proxy serve"`},
		{"no command", []string{"ctl"}, 0, "restart     Restart containers", ""},
		{"unknown command of ctl", []string{"ctl", "restrat"}, 2, "",
			`unknown command "restrat" for "cri-proxy ctl", did you mean restart?`},
		{"too few arguments", []string{"config", "check"}, 2, "", "accepts 1 arg(s), received 0"},
		{"no daemon", []string{"ctl", "status", "--admin-socket", dir + "/none"}, 1, "", "no cri-proxy at " +
			dir + "/none"},
		{"print config", []string{"serve", "--print-config", "--config", good}, 0, "level: debug", ""},
		{"completion", []string{"completion", "bash"}, 0, "cri-proxy", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			if code := run(tt.args, &stdout, &stderr); code != tt.code {
				t.Errorf("exit code %d, want %d; %s", code, tt.code, &stderr)
			}
			if !strings.Contains(stdout.String(), tt.stdout) || !strings.Contains(stderr.String(), tt.stderr) {
				t.Errorf("stdout\n%s\nstderr\n%s", &stdout, &stderr)
			}
			if (stderr.Len() > 0) != (tt.code != 0) {
				t.Errorf("stderr\n%s", &stderr)
			}
		})
	}
}

// Old names go on working for a release, with a hint where it does not disturb the output.
func TestOldNames(t *testing.T) {
	dir := t.TempDir()
	none := filepath.Join(dir, "none")
	file := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(file, []byte("log: {level: debug}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name         string
		args         []string
		code         int
		hint, stderr string
	}{
		{
			"self-update", []string{"upgrade", "--config", none}, 2,
			"hint: cri-proxy upgrade is now cri-proxy self-update\n", "no such file",
		},
		{
			"set-image", []string{"ctl", "upgrade", "a/b", "-c", "app=i", "--admin-socket", none}, 1,
			"hint: cri-proxy ctl upgrade is now cri-proxy ctl set-image\n", "no cri-proxy at " + none,
		},
		{
			"commit-timeout", []string{"ctl", "set-image", "a/b", "-c", "app=i", "--hold-timeout", "-1s"}, 2,
			"hint: --hold-timeout is now --commit-timeout\n", "--commit-timeout -1s is negative",
		},
		{
			"takeover-drain-timeout", []string{"serve", "--print-config", "--config", file, "--upgrade-drain-timeout",
				"7m"}, 0,
			"hint: --upgrade-drain-timeout is now --takeover-drain-timeout\n", "",
		},
		{
			"of install", []string{"install", "--upgrade-drain-timeout", "7m", "--record-calls", "x"}, 2,
			"hint: --upgrade-drain-timeout is now --takeover-drain-timeout\n",
			"--record-calls is for cri-proxy serve only",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			if code := run(tt.args, &stdout, &stderr); code != tt.code {
				t.Errorf("exit code %d, want %d; %s", code, tt.code, &stderr)
			}
			rest, ok := strings.CutPrefix(stderr.String(), tt.hint)
			if !ok || !strings.Contains(rest, tt.stderr) || (tt.stderr == "") != (rest == "") {
				t.Errorf("stderr\n%s", &stderr)
			}
			if strings.Contains(stdout.String(), "hint") {
				t.Errorf("stdout\n%s", &stdout)
			}
			if tt.code == 0 && !strings.Contains(stdout.String(), "upgradeDrainTimeout: 7m") {
				t.Errorf("the value is lost:\n%s", &stdout)
			}
		})
	}
	// Help shows new names of flags only.
	for _, args := range [][]string{{"serve", "--help"}, {"install", "--help"}, {"ctl", "set-image", "--help"}} {
		var stdout, stderr bytes.Buffer
		if code := run(args, &stdout, &stderr); code != 0 || strings.Contains(stdout.String(), "upgrade-drain") ||
			strings.Contains(stdout.String(), "hold-timeout") {
			t.Errorf("%v: %d\n%s", args, code, &stdout)
		}
	}
}
