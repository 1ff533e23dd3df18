// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"fmt"

	"github.com/sirupsen/logrus"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

// While no operation hides anything, the director takes only the calls that it records or that end
// what an operation works on.
func ExampleDirector_Unary() {
	d := interceptors.New(interceptors.Options{View: view.New(), Log: logrus.New()})
	for _, method := range []string{
		runtimeapi.RuntimeService_CreateContainer_FullMethodName,
		runtimeapi.RuntimeService_StopContainer_FullMethodName,
		runtimeapi.RuntimeService_ListContainers_FullMethodName,
		runtimeapi.RuntimeService_ContainerStatus_FullMethodName,
	} {
		fmt.Println(method, d.Unary(method) != nil)
	}
	// Output:
	// /runtime.v1.RuntimeService/CreateContainer true
	// /runtime.v1.RuntimeService/StopContainer true
	// /runtime.v1.RuntimeService/ListContainers false
	// /runtime.v1.RuntimeService/ContainerStatus false
}
