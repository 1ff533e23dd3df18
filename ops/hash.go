// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"encoding/json"
	"hash/fnv"
	"io"
	"strconv"
	"strings"
)

// annotationHash is where kubelet keeps the hash of the container spec that a container was made of. A running
// container whose hash is not that of its spec is replaced (kuberuntime_manager.go containerChanged).
const annotationHash = "io.kubernetes.container.hash"

// kubeletHash returns the value of annotationHash for a container of that name and image, the image to the letter
// as in the pod's spec. It is that of kubelet 1.31 and later (pkg/kubelet/container/helpers.go HashContainer): FNV-1a of
// the JSON form of the two, as spew prints its bytes. Older kubelets hash the whole spec.
func kubeletHash(name, image string) string {
	b, err := json.Marshal(map[string]string{"name": name, "image": image})
	if err != nil {
		panic(err) // strings always have a JSON form
	}
	var text strings.Builder
	for i, c := range b {
		if i > 0 {
			text.WriteByte(' ')
		}
		text.WriteString(strconv.Itoa(int(c)))
	}
	h := fnv.New32a()
	io.WriteString(h, "([]uint8)["+text.String()+"]")
	return strconv.FormatUint(uint64(h.Sum32()), 16)
}
