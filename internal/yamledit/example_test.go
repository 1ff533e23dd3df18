// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package yamledit_test

import (
	"fmt"

	"github.com/cri-proxy/cri-proxy/internal/yamledit"
)

// Everything that somebody else has written into the file stays.
func ExampleSet() {
	doc := []byte("# Ours.\nlog:\n  level: info # not debug\n")
	doc, err := yamledit.Set(doc, "unix:///run/cri-proxy/kubelet.sock", "containerRuntimeEndpoint")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Print(string(doc))
	// Output:
	// # Ours.
	// log:
	//   level: info # not debug
	// containerRuntimeEndpoint: unix:///run/cri-proxy/kubelet.sock
}
