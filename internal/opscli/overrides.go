// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli

import (
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// Overrides writes a row for each override.
func (p *Printer) Overrides(l *opsv1.ListOverridesResponse) error {
	if p.Format.structured() {
		return p.message(l)
	}
	if len(l.GetOverrides()) == 0 {
		return p.words("No overrides.")
	}
	columns := []string{"POD", "CONTAINER", "IMAGE", "SPEC IMAGE", "AGE"}
	if p.Format == Wide {
		columns = append(columns, "IMAGE ID", "POD UID", "OPERATION", "REQUESTER")
	}
	t := newTable(p.Out, columns...)
	for _, o := range l.GetOverrides() {
		row := []string{podName(o.GetPod()), o.GetContainer(), o.GetImage(), o.GetSpecImage(), p.age(o.GetSince())}
		if p.Format == Wide {
			row = append(row, imageID(o.GetImageId()), o.GetPod().GetUid(), o.GetOperationUid(), o.GetRequester())
		}
		t.row(row...)
	}
	return t.flush()
}
