// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// CommitUpgrade commits an upgrade as a caller does who knows that what was prepared still holds.
func CommitUpgrade(ctx context.Context, client opsv1.OpsClient, uid string) error {
	op, err := client.GetOperation(ctx, &opsv1.GetOperationRequest{Uid: uid})
	if err != nil {
		return err
	}
	req := &opsv1.CommitUpgradeRequest{Uid: uid}
	for _, c := range op.GetContainers() {
		req.Environments = append(req.Environments, &opsv1.ContainerEnvironment{Name: c.GetName()})
	}
	_, err = client.CommitUpgrade(ctx, req)
	return err
}
