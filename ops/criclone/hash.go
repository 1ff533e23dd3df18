// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package criclone

import (
	"encoding/json"
	"hash/fnv"
	"io"
	"strconv"
	"strings"
)

// KubeletHash returns the value of [AnnotationHash] for a container with that name and image. The
// image must be written exactly as in the pod's spec.
//
// Kubelet 1.31 and later (pkg/kubelet/container/helpers.go HashContainer) computes FNV-1a over the
// JSON form of the two, as spew prints its bytes. Older kubelets hash the whole spec.
func KubeletHash(name, image string) string {
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
