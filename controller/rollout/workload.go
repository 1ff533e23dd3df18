// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// revisionLabel is what StatefulSets and DaemonSets tell the revision of a pod by.
const revisionLabel = "controller-revision-hash"

// workload is a target with a template.
type workload interface {
	// image is that of a container in the template; empty when there is no such container.
	image(container string) string
	// align brings the template to the images. Unless ready, pods must wait, for what why says. The error is a *specError if the
	// user can correct it.
	align(ctx context.Context, images map[string]string) (ready bool, why string, err error)
	// revisionLabel is the label of a pod that gets these images; empty for none.
	revisionLabel(pod *corev1.Pod, images map[string]string) string
	// settle lets the workload's controller go on as before, and says whether it has taken notice.
	settle(ctx context.Context) (bool, error)
}

func (p *pass) findWorkload(_ context.Context, ref *inplace.WorkloadRef) (*target, error) {
	return nil, wrong("workloads of kind %s are not supported", ref.Kind)
}

// ordinalOf is the number at the end of a name; -1 without.
func ordinalOf(name string) int {
	n, err := strconv.Atoi(name[strings.LastIndexByte(name, '-')+1:])
	if err != nil {
		return -1
	}
	return n
}
