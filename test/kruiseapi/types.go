// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package kruiseapi

import (
	"encoding/json"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// V1alpha1 tells the types of this version from those of V1beta1.
type V1alpha1 struct{}

// V1beta1 tells the types of this version from those of V1alpha1.
type V1beta1 struct{}

// Object is an object of one version of a kind. As in OpenKruise's types status is always sent, as
// far as it has fields that are.
type Object[Spec, Status, Version any] struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              Spec   `json:"spec,omitempty"`
	Status            Status `json:"status,omitempty"`
}

// DeepCopyObject implements runtime.Object.
func (o *Object[Spec, Status, Version]) DeepCopyObject() runtime.Object { return copyOf(o) }

// List is a list of such objects.
type List[Spec, Status, Version any] struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Object[Spec, Status, Version] `json:"items"`
}

// DeepCopyObject implements runtime.Object.
func (l *List[Spec, Status, Version]) DeepCopyObject() runtime.Object { return copyOf(l) }

func copyOf[T any](o *T) *T {
	text, err := json.Marshal(o)
	if err != nil {
		panic(err)
	}
	c := new(T)
	if err := json.Unmarshal(text, c); err != nil {
		panic(err)
	}
	return c
}

// RequestSpec is the spec of a ContainerRecreateRequest in both versions.
type RequestSpec struct {
	PodName                 string           `json:"podName"`
	Containers              []Container      `json:"containers"`
	Strategy                *RequestStrategy `json:"strategy,omitempty"`
	ActiveDeadlineSeconds   *int64           `json:"activeDeadlineSeconds,omitempty"`
	TTLSecondsAfterFinished *int32           `json:"ttlSecondsAfterFinished,omitempty"`
}

// Container is a container to recreate.
type Container struct {
	Name          string                 `json:"name"`
	PreStop       *Handler               `json:"preStop,omitempty"`
	Ports         []corev1.ContainerPort `json:"ports,omitempty"`
	StatusContext *ContainerContext      `json:"statusContext,omitempty"`
}

// Handler is a hook.
type Handler struct {
	Exec      *corev1.ExecAction      `json:"exec,omitempty"`
	HTTPGet   *corev1.HTTPGetAction   `json:"httpGet,omitempty"`
	TCPSocket *corev1.TCPSocketAction `json:"tcpSocket,omitempty"`
}

// ContainerContext is a container's identity.
type ContainerContext struct {
	ContainerID  string `json:"containerID"`
	RestartCount int32  `json:"restartCount"`
}

// RequestStrategy is how to recreate.
type RequestStrategy struct {
	FailurePolicy                 string `json:"failurePolicy,omitempty"`
	OrderedRecreate               bool   `json:"orderedRecreate,omitempty"`
	ForceRecreate                 bool   `json:"forceRecreate,omitempty"`
	TerminationGracePeriodSeconds *int64 `json:"terminationGracePeriodSeconds,omitempty"`
	UnreadyGracePeriodSeconds     *int64 `json:"unreadyGracePeriodSeconds,omitempty"`
	MinStartedSeconds             int32  `json:"minStartedSeconds,omitempty"`
}

// RequestStatusV1alpha1 is v1alpha1's status of a request.
type RequestStatusV1alpha1 struct {
	Phase                   string           `json:"phase"`
	CompletionTime          *metav1.Time     `json:"completionTime,omitempty"`
	Message                 string           `json:"message,omitempty"`
	ContainerRecreateStates []ContainerState `json:"containerRecreateStates,omitempty"`
}

// RequestStatusV1beta1 is v1beta1's, which is not in a release of OpenKruise yet.
type RequestStatusV1beta1 struct {
	RequestStatusV1alpha1   `json:",inline"`
	ContainerStatusSnapshot []ContainerSnapshot `json:"containerStatusSnapshot,omitempty"`
	Conditions              []metav1.Condition  `json:"conditions,omitempty"`
}

// ContainerState is where a container stands.
type ContainerState struct {
	Name     string `json:"name"`
	Phase    string `json:"phase"`
	Message  string `json:"message,omitempty"`
	IsKilled bool   `json:"isKilled,omitempty"`
}

// ContainerSnapshot is what the pod's status says of a new container.
type ContainerSnapshot struct {
	Name         string `json:"name"`
	Ready        bool   `json:"ready"`
	RestartCount int32  `json:"restartCount"`
	ContainerID  string `json:"containerID,omitempty"`
}

// PullTemplate is what ImagePullJob and ImageListPullJob have in common.
type PullTemplate struct {
	PullSecrets      []string            `json:"pullSecrets,omitempty"`
	Selector         *NodeSelector       `json:"selector,omitempty"`
	PodSelector      *PodSelector        `json:"podSelector,omitempty"`
	Parallelism      *intstr.IntOrString `json:"parallelism,omitempty"`
	PullPolicy       *PullPolicy         `json:"pullPolicy,omitempty"`
	CompletionPolicy CompletionPolicy    `json:"completionPolicy"`
	SandboxConfig    *SandboxConfig      `json:"sandboxConfig,omitempty"`
	ImagePullPolicy  string              `json:"imagePullPolicy,omitempty"`
}

// NodeSelector chooses nodes.
type NodeSelector struct {
	Names                []string `json:"names,omitempty"`
	metav1.LabelSelector `json:",inline"`
}

// PodSelector chooses the nodes of pods.
type PodSelector struct {
	metav1.LabelSelector `json:",inline"`
}

// PullPolicy bounds attempts.
type PullPolicy struct {
	TimeoutSeconds *int32 `json:"timeoutSeconds,omitempty"`
	BackoffLimit   *int32 `json:"backoffLimit,omitempty"`
}

// CompletionPolicy says when a job ends.
type CompletionPolicy struct {
	Type                    string `json:"type,omitempty"`
	ActiveDeadlineSeconds   *int64 `json:"activeDeadlineSeconds,omitempty"`
	TTLSecondsAfterFinished *int32 `json:"ttlSecondsAfterFinished,omitempty"`
}

// SandboxConfig goes to the runtime with the pull.
type SandboxConfig struct {
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// JobSpec is the spec of an ImagePullJob.
type JobSpec struct {
	Image        string `json:"image"`
	PullTemplate `json:",inline"`
}

// JobStatus is the status of an ImagePullJob.
type JobStatus struct {
	StartTime      *metav1.Time `json:"startTime,omitempty"`
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`
	Desired        int32        `json:"desired"`
	Active         int32        `json:"active"`
	Succeeded      int32        `json:"succeeded"`
	Failed         int32        `json:"failed"`
	Message        string       `json:"message,omitempty"`
	FailedNodes    []string     `json:"failedNodes,omitempty"`
}

// ListJobSpec is the spec of an ImageListPullJob.
type ListJobSpec struct {
	Images       []string `json:"images"`
	PullTemplate `json:",inline"`
}

// ListJobStatus is the status of an ImageListPullJob.
type ListJobStatus struct {
	StartTime           *metav1.Time   `json:"startTime,omitempty"`
	CompletionTime      *metav1.Time   `json:"completionTime,omitempty"`
	Desired             int32          `json:"desired"`
	Active              int32          `json:"active"`
	Completed           int32          `json:"completed"`
	Succeeded           int32          `json:"succeeded"`
	FailedImageStatuses []*FailedImage `json:"failedImageStatuses,omitempty"`
}

// FailedImage is an image that a node failed to pull.
type FailedImage struct {
	ImagePullJob string `json:"imagePullJob,omitempty"`
	Name         string `json:"name,omitempty"`
	Message      string `json:"message,omitempty"`
}

// The kinds in both versions.

type (
	// RequestV1alpha1 is a ContainerRecreateRequest of v1alpha1.
	RequestV1alpha1 = Object[RequestSpec, RequestStatusV1alpha1, V1alpha1]
	// RequestListV1alpha1 is a list of ContainerRecreateRequests of v1alpha1.
	RequestListV1alpha1 = List[RequestSpec, RequestStatusV1alpha1, V1alpha1]
	// RequestV1beta1 is a ContainerRecreateRequest of v1beta1.
	RequestV1beta1 = Object[RequestSpec, RequestStatusV1beta1, V1beta1]
	// RequestListV1beta1 is a list of ContainerRecreateRequests of v1beta1.
	RequestListV1beta1 = List[RequestSpec, RequestStatusV1beta1, V1beta1]
	// JobV1alpha1 is an ImagePullJob of v1alpha1.
	JobV1alpha1 = Object[JobSpec, JobStatus, V1alpha1]
	// JobListV1alpha1 is a list of ImagePullJobs of v1alpha1.
	JobListV1alpha1 = List[JobSpec, JobStatus, V1alpha1]
	// JobV1beta1 is an ImagePullJob of v1beta1.
	JobV1beta1 = Object[JobSpec, JobStatus, V1beta1]
	// JobListV1beta1 is a list of ImagePullJobs of v1beta1.
	JobListV1beta1 = List[JobSpec, JobStatus, V1beta1]
	// ListJobV1alpha1 is an ImageListPullJob of v1alpha1.
	ListJobV1alpha1 = Object[ListJobSpec, ListJobStatus, V1alpha1]
	// ListJobListV1alpha1 is a list of ImageListPullJobs of v1alpha1.
	ListJobListV1alpha1 = List[ListJobSpec, ListJobStatus, V1alpha1]
	// ListJobV1beta1 is an ImageListPullJob of v1beta1.
	ListJobV1beta1 = Object[ListJobSpec, ListJobStatus, V1beta1]
	// ListJobListV1beta1 is a list of ImageListPullJobs of v1beta1.
	ListJobListV1beta1 = List[ListJobSpec, ListJobStatus, V1beta1]
)

// The versions of OpenKruise's group.
var (
	GroupV1alpha1 = schema.GroupVersion{Group: "apps.kruise.io", Version: "v1alpha1"}
	GroupV1beta1  = schema.GroupVersion{Group: "apps.kruise.io", Version: "v1beta1"}
)

// NewScheme returns a scheme that has the kinds.
func NewScheme() *runtime.Scheme {
	s := runtime.NewScheme()
	for kind, objects := range map[string][4]runtime.Object{
		"ContainerRecreateRequest": {&RequestV1alpha1{}, &RequestListV1alpha1{}, &RequestV1beta1{},
			&RequestListV1beta1{}},
		"ImagePullJob": {&JobV1alpha1{}, &JobListV1alpha1{}, &JobV1beta1{}, &JobListV1beta1{}},
		"ImageListPullJob": {&ListJobV1alpha1{}, &ListJobListV1alpha1{}, &ListJobV1beta1{},
			&ListJobListV1beta1{}},
	} {
		s.AddKnownTypeWithName(GroupV1alpha1.WithKind(kind), objects[0])
		s.AddKnownTypeWithName(GroupV1alpha1.WithKind(kind+"List"), objects[1])
		s.AddKnownTypeWithName(GroupV1beta1.WithKind(kind), objects[2])
		s.AddKnownTypeWithName(GroupV1beta1.WithKind(kind+"List"), objects[3])
	}
	metav1.AddToGroupVersion(s, GroupV1alpha1)
	metav1.AddToGroupVersion(s, GroupV1beta1)
	return s
}
