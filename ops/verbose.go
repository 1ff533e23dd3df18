// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// configIn decodes the CRI message that containerd tells as "config" in the info of a verbose status: its Go
// struct in encoding/json, which has the fields' names as they are in api.proto and no numbers
// (internal/cri/server/container_status.go ContainerInfo). A field that this version of CRI does not have
// cannot be carried over from that, and is an error that names it: a container without it would be another one.
func configIn(info map[string]string, into proto.Message) error {
	var told struct {
		Config json.RawMessage `json:"config"`
	}
	if err := json.Unmarshal([]byte(info["info"]), &told); err != nil || len(told.Config) == 0 || string(told.Config) == "null" {
		return errors.New("the runtime does not tell its config")
	}
	if err := json.Unmarshal(told.Config, into); err != nil {
		return fmt.Errorf("the runtime tells a config that cannot be read (%w)", err)
	}
	if unknown := unknownIn(told.Config, into.ProtoReflect().Descriptor(), "config"); len(unknown) > 0 {
		return fmt.Errorf("the runtime tells of %s, which this version of cri-proxy does not know and would leave out (upgrade cri-proxy)",
			strings.Join(unknown, ", "))
	}
	return nil
}

// unknownIn returns the paths of what is set in the JSON of a message and no field of it. Names count
// without regard to case, as in encoding/json.
func unknownIn(raw json.RawMessage, message protoreflect.MessageDescriptor, at string) []string {
	var set map[string]json.RawMessage
	if json.Unmarshal(raw, &set) != nil {
		return nil // no object: read as what it is, or an error of that
	}
	var unknown []string
	for _, name := range slices.Sorted(maps.Keys(set)) {
		value, path := bytes.TrimSpace(set[name]), at+"."+name
		field := fieldNamed(message, name)
		switch {
		case string(value) == "null":
		case field == nil:
			unknown = append(unknown, path)
		case field.IsMap() || field.Message() == nil:
		case field.IsList():
			var items []json.RawMessage
			if json.Unmarshal(value, &items) == nil {
				for i, item := range items {
					unknown = append(unknown, unknownIn(item, field.Message(), fmt.Sprintf("%s[%d]", path, i))...)
				}
			}
		default:
			unknown = append(unknown, unknownIn(value, field.Message(), path)...)
		}
	}
	return unknown
}

func fieldNamed(message protoreflect.MessageDescriptor, name string) protoreflect.FieldDescriptor {
	if f := message.Fields().ByName(protoreflect.Name(name)); f != nil {
		return f
	}
	for i := range message.Fields().Len() {
		if f := message.Fields().Get(i); strings.EqualFold(string(f.Name()), name) {
			return f
		}
	}
	return nil
}
