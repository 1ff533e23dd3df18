// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package criclone

// Labels that kubelet puts on containers and sandboxes (k8s.io/kubelet/pkg/types).
const (
	LabelPodName      = "io.kubernetes.pod.name"
	LabelPodNamespace = "io.kubernetes.pod.namespace"
	LabelPodUID       = "io.kubernetes.pod.uid"
	LabelContainer    = "io.kubernetes.container.name"
)

// Annotations that kubelet puts on containers (pkg/kubelet/kuberuntime/labels.go).
const (
	AnnotationRestartCount     = "io.kubernetes.container.restartCount"
	AnnotationTerminationPath  = "io.kubernetes.container.terminationMessagePath"
	AnnotationPreStop          = "io.kubernetes.container.preStopHandler"
	AnnotationPorts            = "io.kubernetes.container.ports"
	AnnotationTerminationGrace = "io.kubernetes.pod.terminationGracePeriod"
	// AnnotationHash holds the hash of the container spec that the container was made from. Kubelet
	// replaces a running container whose hash differs from that of its spec
	// (kuberuntime_manager.go containerChanged).
	AnnotationHash = "io.kubernetes.container.hash"
)
