// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package update

import (
	"context"
	"strconv"

	"github.com/cri-proxy/cri-proxy/systemd/node/systemctl"
)

// instances are the two of cri-proxy@.service.
func instances() [2]string { return [2]string{"a", "b"} }

func unit(instance string) string { return "cri-proxy@" + instance + ".service" }

func other(instance string) string {
	if i := instances(); instance == i[0] {
		return i[1]
	}
	return instances()[0]
}

// unitState is what systemd says of an instance.
type unitState struct {
	active string // active, activating, deactivating, inactive, failed
	pid    int
	status string
}

func (u unitState) runs() bool {
	return u.pid != 0 || u.active == "activating" || u.active == "deactivating"
}

func stateOf(ctx context.Context, instance string) (unitState, error) {
	p, err := systemctl.Show(ctx, unit(instance), "ActiveState", "MainPID", "StatusText")
	if err != nil {
		return unitState{}, err
	}
	u := unitState{active: p["ActiveState"], status: p["StatusText"]}
	u.pid, _ = strconv.Atoi(p["MainPID"])
	return u, nil
}
