// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/cri-proxy/cri-proxy/systemd/node/systemctl"
)

// instanceUnit is in the name of the cgroup of a daemon that systemd has started.
var instanceUnit = regexp.MustCompile(`cri-proxy@[a-z]\.service`)

// unitOf returns the unit of a process. It is empty if that is no unit of ours.
func (x *examination) unitOf(pid int) string {
	b, err := os.ReadFile(filepath.Join(x.o.Proc, fmt.Sprint(pid), "cgroup"))
	if err != nil {
		return ""
	}
	return instanceUnit.FindString(string(b))
}

// units checks the units, where systemd runs.
func (x *examination) units(ctx context.Context) {
	const check = "units"
	if _, err := os.Stat(x.o.Systemd); err != nil {
		return
	}
	serving := x.unitOf(int(x.info.GetPid()))
	if x.info != nil && serving == "" {
		x.warn(check, "see docs/OPERATIONS.md#install", "cri-proxy was not started by systemd: nothing starts it again")
		return
	}
	wanted := []string{"cri-proxy.socket", "cri-proxy-admin.socket"}
	if serving != "" {
		wanted = append(wanted, serving)
	}
	before := len(x.findings)
	for _, unit := range wanted {
		u, err := show(ctx, unit)
		switch {
		case err != nil:
			x.warn(check, "", "%v", err)
		case u["LoadState"] != "loaded":
			x.fail(check, "see docs/OPERATIONS.md#install", "%s is not installed (%s)", unit, u["LoadState"])
		case u["ActiveState"] != "active":
			x.fail(check, "systemctl start "+unit, "%s is %s (%s)", unit, u["ActiveState"], u["Result"])
		case u["UnitFileState"] != "enabled":
			x.warn(check, "systemctl enable "+unit, "%s is %s: it is not started at the "+
				"next boot", unit, u["UnitFileState"])
		case u["NeedDaemonReload"] == "yes":
			x.warn(check, "systemctl daemon-reload", "%s has changed on disk", unit)
		}
	}
	if len(x.findings) == before {
		x.ok(check, "%s are active and enabled", strings.Join(wanted, ", "))
	}
}

func show(ctx context.Context, unit string) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return systemctl.Show(ctx, unit, "LoadState", "ActiveState", "UnitFileState", "NeedDaemonReload", "Result")
}
