// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package bypassstate_test

import (
	"fmt"
	"os"
	"time"

	"github.com/cri-proxy/cri-proxy/internal/bypassstate"
)

func ExampleRead() {
	dir, err := os.MkdirTemp("", "state")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	fmt.Println("bypassed:", bypassstate.Read(dir) != nil)
	if err := (&bypassstate.State{Since: time.Now(), Reason: "a slow disk"}).Write(dir); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("bypassed:", bypassstate.Read(dir).Reason)
	// Output:
	// bypassed: false
	// bypassed: a slow disk
}
