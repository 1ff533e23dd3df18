// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"

	"google.golang.org/grpc"

	"github.com/cri-proxy/cri-proxy/ops/prepull/imagestore"
)

// Held is what a runtime keeps because of us.
type Held = imagestore.Held

// Holds returns what the runtime at conn keeps because of us: nothing if it is not containerd.
func Holds(ctx context.Context, conn grpc.ClientConnInterface) (Held, error) {
	return imagestore.New(conn).Holds(ctx)
}

// LetGo ends what the runtime at conn keeps because of us, and returns what that was: see
// [imagestore.Store.LetGo]. [ForgetPins] is for the state directory.
func LetGo(ctx context.Context, conn grpc.ClientConnInterface) (Held, error) {
	return imagestore.New(conn).LetGo(ctx)
}
