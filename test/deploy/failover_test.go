// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"encoding/json"
	"fmt"
	"maps"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// testLeaderKilled: the process dies with its Lease held, which must run out first.
func testLeaderKilled(t *testing.T) {
	loseLeader(t, "killed", func(pod *corev1.Pod) {
		must(t, syscall.Kill(pid(t, pod), syscall.SIGKILL))
	})
}

// testLeaderDeleted: a leader that is asked to stop releases its Lease, so that another begins at
// once.
func testLeaderDeleted(t *testing.T) {
	loseLeader(t, "deleted", func(pod *corev1.Pod) {
		kubectl(t, "-n", pod.Namespace, "delete", "pod", pod.Name, "--wait=false")
	})
}

// loseLeader takes the leader away when a rollout and a pull are half done, and checks that both
// end as if nothing had been.
func loseLeader(t *testing.T, namespace string, lose func(*corev1.Pod)) {
	const pods, seconds = 3, 10
	must(t, bed.CreateNamespace(t.Context(), namespace))
	name, identity := leader(t, "cri-proxy-system", "")
	must(t, bed.PushLargeImage(t.Context(), namespace+":1", 2, seconds))
	startRollout(t, namespace, pods)
	before := uids(t, namespace)
	eventually(t, "a pod is updated", func() (string, bool) {
		r := rollout(t, namespace)
		return fmt.Sprintf("%+v", r.Status), r.Status.Updated >= 1
	})
	startPull(t, namespace) // only now: it goes by the clock, and the rollout by how fast the machine is
	eventually(t, "the rollout and the pull are half done", func() (string, bool) {
		r, j := rollout(t, namespace), job(t, namespace)
		if r.Status.Updated >= pods || j.Status.CompletionTime != nil {
			t.Fatalf("too late, it has all been done: %+v %+v", r.Status, j.Status)
		}
		return fmt.Sprintf("%+v %+v", r.Status, j.Status), r.Status.Updated >= 1 && j.Status.Active == 1
	})
	var pod corev1.Pod
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: "cri-proxy-system", Name: name}, &pod))
	gone := time.Now()
	lose(&pod)
	next, _ := leader(t, "cri-proxy-system", identity)
	t.Logf("%s leads %s after %s was gone", next, time.Since(gone).Round(time.Millisecond), name)
	finishWork(t, namespace, pods)
	if after := uids(t, namespace); !maps.Equal(before, after) {
		t.Errorf("the pods were %v and are %v", before, after)
	}
	controllers(t, "cri-proxy-system")
}

// finishWork waits for the end of what startWork began and checks that it was done, and done once.
func finishWork(t *testing.T, namespace string, pods int) {
	t.Helper()
	eventually(t, "the rollout is complete", func() (string, bool) {
		r := rollout(t, namespace)
		return fmt.Sprintf("%+v", r.Status), meta.IsStatusConditionTrue(r.Status.Conditions, inplace.ConditionComplete)
	})
	eventually(t, "the job is complete", func() (string, bool) {
		j := job(t, namespace)
		return fmt.Sprintf("%+v", j.Status), j.Status.CompletionTime != nil
	})
	eventually(t, "the pods say so, for which kubelet takes a moment", func() (string, bool) {
		said := ""
		for _, p := range shop(t, namespace) {
			if c := p.Status.ContainerStatuses[0]; c.RestartCount < 1 || c.Image != bed.Image("app:2") {
				said += fmt.Sprintf("%s %+v; ", p.Name, c)
			}
		}
		return said, said == ""
	})
	for _, p := range shop(t, namespace) {
		if c := p.Status.ContainerStatuses[0]; c.RestartCount != 1 || c.Image != bed.Image("app:2") {
			t.Errorf("pod %s: %+v", p.Name, c)
		}
	}
	if n := len(shop(t, namespace)); n != pods {
		t.Errorf("there are %d pods", n)
	}
	j := job(t, namespace)
	if s := j.Status; s.Desired != 1 || s.Succeeded != 1 || s.Failed != 0 {
		t.Errorf("job: %+v", s)
	}
	conn, err := grpc.NewClient("unix://"+bed.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	list, err := opsv1.NewImagesClient(conn).ListPulls(t.Context(), &opsv1.ListPullsRequest{})
	must(t, err)
	pulled := 0
	for _, op := range list.GetPulls() {
		if op.GetOwner() != fmt.Sprintf("ImagePullJob/%s/%s/%s", j.Namespace, j.Name, j.UID) {
			continue
		}
		if pulled++; op.GetReason() != "Pulled" {
			t.Errorf("pull: %v", op)
		}
	}
	if pulled != 1 {
		t.Errorf("the node pulled %d times for the job", pulled)
	}
}

func shop(t *testing.T, namespace string) []corev1.Pod {
	t.Helper()
	var list corev1.PodList
	must(t, api.List(t.Context(), &list, client.InNamespace(namespace), client.MatchingLabels{"app": "shop"}))
	return list.Items
}

func uids(t *testing.T, namespace string) map[string]types.UID {
	t.Helper()
	all := map[string]types.UID{}
	for _, p := range shop(t, namespace) {
		all[p.Name] = p.UID
	}
	return all
}

// pid is the process of a pod's only container, as containerd knows it.
func pid(t *testing.T, pod *corev1.Pod) int {
	t.Helper()
	conn, err := bed.DialRuntime()
	must(t, err)
	defer conn.Close()
	client := runtimeapi.NewRuntimeServiceClient(conn)
	list, err := client.ListContainers(t.Context(),
		&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
			State:         &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
			LabelSelector: map[string]string{"io.kubernetes.pod.uid": string(pod.UID)},
		}})
	must(t, err)
	if len(list.GetContainers()) != 1 {
		t.Fatalf("pod %s has %v", pod.Name, list.GetContainers())
	}
	status, err := client.ContainerStatus(t.Context(),
		&runtimeapi.ContainerStatusRequest{ContainerId: list.GetContainers()[0].GetId(), Verbose: true})
	must(t, err)
	var info struct{ Pid int }
	must(t, json.Unmarshal([]byte(status.GetInfo()["info"]), &info))
	if info.Pid <= 1 {
		t.Fatalf("pid %d of pod %s", info.Pid, pod.Name)
	}
	return info.Pid
}
