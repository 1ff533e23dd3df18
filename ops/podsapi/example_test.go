// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package podsapi_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/cri-proxy/cri-proxy/ops/podsapi"
)

// A kubelet before 1.37 has no Pods API.
func ExampleClient_Pod() {
	kubelet := podsapi.New(filepath.Join("none", "pods-api.sock"))
	pod, err := kubelet.Pod(context.Background(), "0a1b2c3d-uid")
	switch {
	case errors.Is(err, podsapi.ErrUnavailable):
		fmt.Println("kubelet does not tell")
	case errors.Is(err, podsapi.ErrNotFound):
		fmt.Println("the pod is gone")
	case err != nil:
		fmt.Println(err)
	case pod.Deleting:
		fmt.Println("the pod goes away")
	}
	// Output: kubelet does not tell
}
