// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package kruiseapi

import (
	"context"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
)

// Client is a client of one resource in one version and namespace, as generated clientsets have
// them: it sends and takes typed objects over client-go's REST client.
type Client struct {
	rest                rest.Interface
	parameters          runtime.ParameterCodec
	namespace, resource string
}

// NewClient returns the client of a resource.
func NewClient(config *rest.Config, version schema.GroupVersion, namespace, resource string) (*Client, error) {
	scheme := NewScheme()
	c := rest.CopyConfig(config)
	c.GroupVersion, c.APIPath = &version, "/apis"
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	r, err := rest.RESTClientFor(c)
	if err != nil {
		return nil, err
	}
	return &Client{rest: r, parameters: runtime.NewParameterCodec(scheme), namespace: namespace, resource: resource},
		nil
}

func (c *Client) request(r *rest.Request, options runtime.Object) *rest.Request {
	return r.Namespace(c.namespace).Resource(c.resource).VersionedParams(options, c.parameters)
}

// Create sends an object. What is answered goes into another one, which is empty, as in all of
// these.
func (c *Client) Create(ctx context.Context, o, answer runtime.Object, options metav1.CreateOptions) error {
	return c.request(c.rest.Post(), &options).Body(o).Do(ctx).Into(answer)
}

// Update puts an object in the place of the one of that name.
func (c *Client) Update(
	ctx context.Context, name string, o, answer runtime.Object, options metav1.UpdateOptions,
) error {
	return c.request(c.rest.Put().Name(name), &options).Body(o).Do(ctx).Into(answer)
}

// Patch changes an object.
func (c *Client) Patch(
	ctx context.Context, name string, kind types.PatchType, data []byte, answer runtime.Object,
	options metav1.PatchOptions,
) error {
	return c.request(c.rest.Patch(kind).Name(name), &options).Body(data).Do(ctx).Into(answer)
}

// Get reads an object.
func (c *Client) Get(ctx context.Context, name string, answer runtime.Object) error {
	return c.request(c.rest.Get().Name(name), &metav1.GetOptions{}).Do(ctx).Into(answer)
}

// Raw is what the API server answers to a get.
func (c *Client) Raw(ctx context.Context, name string) ([]byte, error) {
	return c.request(c.rest.Get().Name(name), &metav1.GetOptions{}).Do(ctx).Raw()
}

// List reads all objects of the namespace.
func (c *Client) List(ctx context.Context, answer runtime.Object) error {
	return c.request(c.rest.Get(), &metav1.ListOptions{}).Do(ctx).Into(answer)
}

// Watch tells of changes to the object with this name since a resource version.
func (c *Client) Watch(ctx context.Context, name, since string) (watch.Interface, error) {
	options := &metav1.ListOptions{FieldSelector: "metadata.name=" + name, ResourceVersion: since, Watch: true}
	return c.request(c.rest.Get(), options).Watch(ctx)
}

// Delete removes an object.
func (c *Client) Delete(ctx context.Context, name string, options metav1.DeleteOptions) error {
	return c.rest.Delete().Namespace(c.namespace).Resource(c.resource).Name(name).Body(&options).Do(ctx).Error()
}
