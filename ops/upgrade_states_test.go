// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"google.golang.org/protobuf/types/known/durationpb"
	"time"
)

func seconds(n int64) *durationpb.Duration { return durationpb.New(time.Duration(n) * time.Second) }
