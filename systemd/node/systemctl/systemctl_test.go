// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package systemctl_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cri-proxy/cri-proxy/systemd/node/systemctl"
)

func TestSystemctl(t *testing.T) {
	dir := t.TempDir()
	script := `#!/bin/sh
case "$*" in
"show x.service -p ActiveState,ExecStart") printf 'ActiveState=active\nExecStart=/bin/x --a=b\n' ;;
*) echo "Unit y.service not found."; exit 5 ;;
esac
`
	if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	got, err := systemctl.Show(t.Context(), "x.service", "ActiveState", "ExecStart")
	if err != nil || len(got) != 2 || got["ActiveState"] != "active" || got["ExecStart"] != "/bin/x --a=b" {
		t.Errorf("%v, %v", got, err)
	}
	err = systemctl.Run(t.Context(), "start", "y.service")
	if err == nil ||
		!strings.Contains(err.Error(), "systemctl start y.service: exit status 5: Unit y.service not found.") {
		t.Error(err)
	}
}
