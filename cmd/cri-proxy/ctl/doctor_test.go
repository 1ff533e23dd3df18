// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/cri-proxy/cri-proxy/systemd/node/doctor"
)

// What is wrong is an exit code, and the same in every form of output.
func TestDoctorOutput(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(file,
		[]byte("listen: {path: /nowhere/cri.sock}\nstateDir: /nowhere\nruntimeEndpoint: "+
			"/nowhere/rt.sock\nadminSocket: /nowhere/admin.sock\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) string {
		t.Helper()
		var out bytes.Buffer
		err := command(&out, append([]string{"doctor", "--config", file}, args...)...).ExecuteContext(t.Context())
		if err == nil || !regexp.MustCompile(`^\d+ of \d+ checks failed$`).MatchString(err.Error()) {
			t.Errorf("error %v", err)
		}
		return out.String()
	}
	var findings []doctor.Finding
	if err := json.Unmarshal([]byte(run("-o", "json")), &findings); err != nil {
		t.Fatal(err)
	}
	text, yaml := run(), run("-o", "yaml")
	for _, f := range findings {
		if f.Check == "clock" || f.Check == "units" {
			continue
		}
		if f.Detail == "" || f.Status == doctor.Fail && f.Hint == "" {
			t.Errorf("%+v says too little", f)
		}
		if !strings.Contains(text, f.Detail) || !strings.Contains(text, f.Hint) ||
			!strings.Contains(yaml, "check: "+f.Check) {
			t.Errorf("%+v is not in all forms of the output", f)
		}
	}
	if !regexp.MustCompile(
		`(?m)^FAIL  daemon +cri-proxy does not answer on /nowhere/admin.sock: .*\n +-> systemctl start`).
		MatchString(text) {
		t.Errorf("no daemon in\n%s", text)
	}
}
