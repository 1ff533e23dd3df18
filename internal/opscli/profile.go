// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli

import (
	"context"
	"errors"
	"fmt"
	"io"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// Profile takes a profile of the daemon and writes it to out.
func (c Client) Profile(ctx context.Context, out io.Writer, req *opsv1.ProfileRequest) error {
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := opsv1.NewDebugClient(conn).Profile(ctx, req)
	for err == nil {
		var chunk *opsv1.ProfileChunk
		if chunk, err = stream.Recv(); err == nil {
			if _, err := out.Write(chunk.GetData()); err != nil {
				return fmt.Errorf("profile: %w", err)
			}
		}
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return plain(err)
}
