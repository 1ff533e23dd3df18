// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"context"
	"encoding/base64"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// loop is a process that ends as soon as it is told to. Kubelet would expand a dollar sign before a
// parenthesis, so it has none.
const loop = `'trap "exit 0" TERM; sleep 3600 & wait'`

// sameCase is a pod whose container app is restarted once by a request and once by kubelet itself,
// after its sources have changed.
type sameCase struct {
	name string
	// spec is the pod's, beyond what all have; %[1]s is busybox, %[2]s its loop.
	spec string
	// resize is the patch of the pod's resources, if any.
	resize string
	// rewrite runs in container app when the other sources change, if any.
	rewrite string
	// want are some of the values that kubelet's restart must show: a test of the test. They are
	// parts of what the dump has.
	want map[string]string
}

// pod returns a case's pod. It is created, not applied: the annotation that kubectl apply leaves
// would hold the old values.
func (c sameCase) pod(ns string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata:
  name: %s
  namespace: %s
  labels: {tier: before, case: %[1]s}
  annotations: {note: before, quoted.key/with.dots: "before\n\"quoted\""}
spec:
  terminationGracePeriodSeconds: 2
%[3]s
---
`, c.name, ns, strings.TrimRight(strings.NewReplacer("BUSYBOX", bed.Image("busybox:1.0"), "LOOP", loop).Replace(c.spec),
		"\n"))
}

// sources are the objects that the pods take values from, as they are before and after.
func sources(ns string, after bool) string {
	when, only, also := "before", "gone: before", ""
	if after {
		when, only = "after", "fresh: after"
		also = fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata: {name: appearing, namespace: %[1]s}
data: {appeared: after, both: appearing-after}
---
apiVersion: v1
kind: Secret
metadata: {name: appearing, namespace: %[1]s}
stringData: {secretly: after}
---
`, ns)
	} else {
		also = fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata: {name: vanishing, namespace: %[1]s}
data: {vanished: before, both: vanishing-before}
---
apiVersion: v1
kind: Secret
metadata: {name: vanishing, namespace: %[1]s}
stringData: {vanished: before}
---
`, ns)
	}
	encoded := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	onlySecret := fmt.Sprintf("gone: %s", encoded("before"))
	if after {
		onlySecret = fmt.Sprintf("fresh: %s", encoded("after"))
	}
	return fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata: {name: conf, namespace: %[1]s}
data: {a: %[2]s, b: "%[2]s  b", reference: "$(a) $$(a)", dotted.key-1: %[2]s, both: conf-%[2]s, empty: "", multi: "%[2]s\nline two\n", %[3]s}
binaryData: {blob: %[4]s}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: more, namespace: %[1]s}
data: {both: more-%[2]s, b: more-%[2]s, c: %[2]s}
---
apiVersion: v1
kind: Secret
metadata: {name: keys, namespace: %[1]s}
data: {user: %[5]s, both: %[6]s, line: %[7]s, raw: %[4]s, %[8]s}
---
`, ns, when, only, encoded(when+"\xff\xfe\x80 not UTF-8"), encoded("user-"+when), encoded("secret-"+when), encoded(when+"\n"), onlySecret) + also
}

// services are those of the namespace, and one of namespace default that no pod here may hear of.
func services(ns string, after bool) string {
	port := 80
	also := "old"
	if after {
		port, also = 8000, "fresh-svc"
	}
	return fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: web, namespace: %[1]s}
spec: {ports: [{name: http, port: %[2]d}, {name: metrics, port: 9090}, {name: dns-udp, port: 53, protocol: UDP}]}
---
apiVersion: v1
kind: Service
metadata: {name: %[3]s, namespace: %[1]s}
spec: {ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: headless-%[2]d, namespace: %[1]s}
spec: {clusterIP: None, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: external-%[2]d, namespace: %[1]s}
spec: {type: ExternalName, externalName: example.com}
---
apiVersion: v1
kind: Service
metadata: {name: %[1]s-elsewhere-%[2]d, namespace: default}
spec: {ports: [{port: 80}]}
---
`, ns, port, also)
}

func sameCases(host, image, volumeImage, ns string) []sameCase {
	// The runtime hands variables on as JSON, which has a sign of its own for what is not UTF-8.
	return []sameCase{
		{
			name: "values",
			spec: `
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    env:
    - {name: FIRST, value: "one"}
    - {name: CHAIN, value: "$(FIRST)-two"}
    - {name: LONG, value: "$(CHAIN)-three $(CHAIN)"}
    - {name: ESCAPED, value: "$$(FIRST) $$$(FIRST) $$$$(FIRST)"}
    - {name: UNDEFINED, value: "$(NOBODY) stays"}
    - {name: FORWARD, value: "$(LAST)"}
    - {name: OF_SERVICE, value: "$(WEB_SERVICE_HOST):$(WEB_SERVICE_PORT_HTTP)"}
    - {name: OF_FRESH_SERVICE, value: "$(FRESH_SVC_SERVICE_PORT)"}
    - {name: OF_IMAGE, value: "$(VERSION)"}
    - {name: ODD, value: "$(unclosed $() $ $(FIRST) 100% \"quoted\" $"}
    - {name: SELF, value: "$(SELF)x"}
    - {name: EMPTY, value: ""}
    - {name: TEXT, value: "grüße\nzwei\tZeilen = "}
    - {name: WEB_PORT, value: "wins over the service's"}
    - {name: OF_OVERRIDDEN, value: "$(WEB_PORT)"}
    - {name: LAST, value: last}
    - {name: FIRST, value: "again $(FIRST)"}
    - {name: VERSION, value: "wins over the image's"}
`,
			want: map[string]string{
				"environment LONG": "one-two-three one-two", "environment ESCAPED": "$(FIRST) $one $$(FIRST)",
				"environment FORWARD":          "$(LAST)",
				"environment OF_FRESH_SERVICE": "80", "environment FIRST": "again one",
				"environment OF_IMAGE": "$(VERSION)",
			},
		},
		{
			name: "overrides",
			spec: `
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    envFrom:
    - {configMapRef: {name: conf}}
    - {configMapRef: {name: more}}
    - {prefix: P_, configMapRef: {name: conf}}
    - {configMapRef: {name: nobody, optional: true}}
    - {secretRef: {name: keys}}
    - {configMapRef: {name: appearing, optional: true}}
    - {configMapRef: {name: vanishing, optional: true}}
    - {secretRef: {name: appearing, optional: true}}
    - {prefix: V_, secretRef: {name: vanishing, optional: true}}
    env:
    - {name: P_both, value: "$(P_both) and more"}
    - {name: REFERENCES, value: "$(a) $(P_a) $(dotted.key-1) $(reference) $(secretly)"}
    - {name: user, value: "$(user)!"}
    - {name: user, value: "$(user)!"}
    - {name: c, valueFrom: {configMapKeyRef: {name: conf, key: a}}}
`,
			want: map[string]string{"environment both": "appearing-after", "environment user": "user-after!!",
				"environment b":          "more-after",
				"environment REFERENCES": "after after after $(a) $$(a) after"},
		},
		{
			name: "secrets",
			spec: `
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    envFrom: [{prefix: S_, secretRef: {name: keys}}]
    env:
    - {name: RAW, valueFrom: {secretKeyRef: {name: keys, key: raw}}}
    - {name: LINE, valueFrom: {secretKeyRef: {name: keys, key: line}}}
    - {name: REFERENCES, value: "<$(RAW)$(S_line)>"}
`,
			want: map[string]string{"environment RAW": "after\uFFFD\uFFFD\uFFFD not",
				"environment REFERENCES": "<after\uFFFD\uFFFD\uFFFD not UTF-8after\n>"},
		},
		{
			name: "keys",
			spec: `
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    env:
    - {name: HERE, valueFrom: {configMapKeyRef: {name: conf, key: multi}}}
    - {name: NO_KEY, valueFrom: {configMapKeyRef: {name: conf, key: nobody, optional: true}}}
    - {name: NO_MAP, valueFrom: {configMapKeyRef: {name: nobody, key: a, optional: true}}}
    - {name: KEY_GONE, valueFrom: {configMapKeyRef: {name: conf, key: gone, optional: true}}}
    - {name: KEY_FRESH, valueFrom: {configMapKeyRef: {name: conf, key: fresh, optional: true}}}
    - {name: MAP_GONE, valueFrom: {configMapKeyRef: {name: vanishing, key: vanished, optional: true}}}
    - {name: MAP_FRESH, valueFrom: {configMapKeyRef: {name: appearing, key: appeared, optional: true}}}
    - {name: EMPTY, valueFrom: {configMapKeyRef: {name: conf, key: empty}}}
    - {name: S_NO_KEY, valueFrom: {secretKeyRef: {name: keys, key: nobody, optional: true}}}
    - {name: S_NO_SECRET, valueFrom: {secretKeyRef: {name: nobody, key: a, optional: true}}}
    - {name: S_KEY_GONE, valueFrom: {secretKeyRef: {name: keys, key: gone, optional: true}}}
    - {name: S_KEY_FRESH, valueFrom: {secretKeyRef: {name: keys, key: fresh, optional: true}}}
    - {name: S_GONE, valueFrom: {secretKeyRef: {name: vanishing, key: vanished, optional: true}}}
    - {name: S_FRESH, valueFrom: {secretKeyRef: {name: appearing, key: secretly, optional: true}}}
    - {name: REFERENCES, value: "$(KEY_GONE) $(KEY_FRESH) $(MAP_GONE) $(MAP_FRESH) $(S_GONE) $(S_FRESH)"}
`,
			want: map[string]string{"environment REFERENCES": "$(KEY_GONE) after $(MAP_GONE) after $(S_GONE) after",
				"environment HERE": "after\nline two\n"},
		},
		{
			name: "binary", // binaryData is for volumes only
			spec: `
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    envFrom: [{prefix: B_, configMapRef: {name: conf}}]
    env: [{name: BLOB, valueFrom: {configMapKeyRef: {name: conf, key: blob, optional: true}}}]
    volumeMounts:
    - {name: conf, mountPath: /conf}
    - {name: conf, mountPath: /blob, subPath: blob}
  volumes: [{name: conf, configMap: {name: conf}}]
`,
			want: map[string]string{"file /blob": `after\xff\xfe\x80`, "environment B_a": "after"},
		},
		{
			name: "downward",
			spec: `
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    env:
    - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: NAMESPACE_OF_POD, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
    - {name: UID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}
    - {name: LABEL, valueFrom: {fieldRef: {fieldPath: "metadata.labels['tier']"}}}
    - {name: NO_LABEL, valueFrom: {fieldRef: {fieldPath: "metadata.labels['nobody']"}}}
    - {name: FRESH_LABEL, valueFrom: {fieldRef: {fieldPath: "metadata.labels['fresh']"}}}
    - {name: NOTE, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['note']"}}}
    - {name: QUOTED, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['quoted.key/with.dots']"}}}
    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    - {name: ACCOUNT, valueFrom: {fieldRef: {fieldPath: spec.serviceAccountName}}}
    - {name: HOST, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}
    - {name: HOSTS, valueFrom: {fieldRef: {fieldPath: status.hostIPs}}}
    - {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    - {name: IPS, valueFrom: {fieldRef: {fieldPath: status.podIPs}}}
    - {name: REFERENCES, value: "$(POD)/$(LABEL)/$(NOTE)/$(IP)"}
`,
			want: map[string]string{"environment REFERENCES": "downward/after/after/",
				"environment FRESH_LABEL": "after",
				"environment HOST":        bed.BridgeIP},
		},
		{
			name: "resources",
			spec: `
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    resources: {requests: {cpu: 50m}}
    env:
    - {name: CPU, valueFrom: {resourceFieldRef: {resource: limits.cpu, divisor: 1m}}}
    - {name: CPUS, valueFrom: {resourceFieldRef: {resource: limits.cpu}}}
    - {name: CPU_REQUEST, valueFrom: {resourceFieldRef: {resource: requests.cpu, divisor: 1m}}}
    - {name: CPU_REQUESTS, valueFrom: {resourceFieldRef: {resource: requests.cpu}}}
    - {name: MEMORY, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}
    - {name: MEMORY_REQUEST, valueFrom: {resourceFieldRef: {resource: requests.memory}}}
    - {name: DISK, valueFrom: {resourceFieldRef: {resource: limits.ephemeral-storage, divisor: 1k}}}
    - {name: OTHER_CPU, valueFrom: {resourceFieldRef: {containerName: other, resource: limits.cpu, divisor: 1m}}}
    - {name: OTHER_CPUS, valueFrom: {resourceFieldRef: {containerName: other, resource: limits.cpu}}}
    - {name: OTHER_MEMORY, valueFrom: {resourceFieldRef: {containerName: other, resource: limits.memory}}}
    - {name: OTHER_MEBIBYTES, valueFrom: {resourceFieldRef: {containerName: other, resource: limits.memory, divisor: 1Mi}}}
    - {name: OTHER_REQUEST, valueFrom: {resourceFieldRef: {containerName: other, resource: requests.memory, divisor: 1k}}}
    - {name: BARE_CPU, valueFrom: {resourceFieldRef: {containerName: bare, resource: limits.cpu}}}
    - {name: BARE_MEMORY, valueFrom: {resourceFieldRef: {containerName: bare, resource: limits.memory}}}
    - {name: BARE_REQUEST, valueFrom: {resourceFieldRef: {containerName: bare, resource: requests.cpu}}}
    volumeMounts: [{name: limits, mountPath: /limits}]
  - name: other
    image: BUSYBOX
    command: [sh, -c, LOOP]
    resources: {requests: {cpu: 100m, memory: 20Mi}, limits: {cpu: 1500m, memory: 30Mi}}
  - {name: bare, image: BUSYBOX, command: [sh, -c, LOOP]}
  volumes:
  - name: limits
    downwardAPI:
      items:
      - {path: own, resourceFieldRef: {containerName: app, resource: limits.memory}}
      - {path: other, resourceFieldRef: {containerName: other, resource: limits.cpu, divisor: 1m}}
`,
			resize: `{"spec":{"containers":[{"name":"other","resources":{"requests":{"cpu":"110m","memory":"24Mi"},"limits":{"cpu":"1700m","memory":"40Mi"}}}]}}`,
			want:   map[string]string{"environment OTHER_CPU": "1700", "environment OTHER_MEBIBYTES": "40"},
		},
		{
			name: "resized",
			spec: `
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    resources: {requests: {cpu: 100m, memory: 64Mi}, limits: {cpu: 500m, memory: 64Mi}}
    env:
    - {name: CPU, valueFrom: {resourceFieldRef: {resource: limits.cpu, divisor: 1m}}}
    - {name: CPU_REQUEST, valueFrom: {resourceFieldRef: {resource: requests.cpu, divisor: 1m}}}
    - {name: MEMORY, valueFrom: {resourceFieldRef: {resource: limits.memory}}}
    - {name: REFERENCES, value: "-Xmx$(MEMORY)"}
`,
			resize: `{"spec":{"containers":[{"name":"app","resources":{"requests":{"cpu":"200m","memory":"128Mi"},"limits":{"cpu":"800m","memory":"128Mi"}}}]}}`,
			want:   map[string]string{"environment CPU": "800", "environment REFERENCES": "-Xmx134217728"},
		},
		{
			name: "links",
			spec: `
  enableServiceLinks: true
  containers:
  - {name: app, image: BUSYBOX, command: [sh, -c, LOOP]}
`,
			want: map[string]string{"environment WEB_SERVICE_PORT_HTTP": "8000",
				"environment FRESH_SVC_PORT_80_TCP_PROTO": "tcp",
				"environment WEB_PORT_53_UDP_PORT":        "53", "environment KUBERNETES_SERVICE_PORT_HTTPS": "443"},
		},
		{
			name: "no-links",
			spec: `
  enableServiceLinks: false
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP, "$(WEB_SERVICE_HOST)", "$(KUBERNETES_SERVICE_HOST)"]
    env:
    - {name: NONE, value: "$(WEB_SERVICE_HOST)"}
    - {name: ALWAYS, value: "$(KUBERNETES_SERVICE_HOST)"}
    - {name: NOTE, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['note']"}}}
`,
			want: map[string]string{"environment NONE": "$(WEB_SERVICE_HOST)", "environment ALWAYS": "10.96.0.1"},
		},
		{
			name: "arguments",
			spec: `
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP, "$(a)", "$$(a)"]
    args: ["--setting=$(a)", "$(NOBODY)", "$(WEB_SERVICE_PORT)", "", "$(NOTE) $(NOTE)", "$(user)", "$(VERSION)"]
    envFrom: [{configMapRef: {name: conf}}, {secretRef: {name: keys}}]
    env: [{name: NOTE, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['note']"}}}]
`,
			want: map[string]string{"argument 3": "after", "argument 4": "$(a)", "argument 5": "--setting=after",
				"argument 7": "8000", "argument 9": "after after",
				"argument 10": "user-after", "argument 11": "$(VERSION)"},
		},
		{
			name: "files",
			spec: `
  initContainers:
  - name: setup
    image: BUSYBOX
    command: [sh, -c, "mkdir /work/sub; printf \"# a comment\\nKEY='before'\\n\\n  MULTI='before\\nline two' # more\\nGONE='before'\\nLAST='before'\\n\" | tee /work/settings.env >/work/sub/other.env"]
    volumeMounts: [{name: work, mountPath: /work}]
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP, "$(KEY)"]
    env:
    - {name: KEY, valueFrom: {fileKeyRef: {volumeName: work, path: settings.env, key: KEY}}}
    - {name: MULTI, valueFrom: {fileKeyRef: {volumeName: work, path: sub/other.env, key: MULTI}}}
    - {name: GONE, valueFrom: {fileKeyRef: {volumeName: work, path: settings.env, key: GONE, optional: true}}}
    - {name: NONE, valueFrom: {fileKeyRef: {volumeName: work, path: settings.env, key: NONE, optional: true}}}
    - {name: REFERENCES, value: "$(KEY) $(GONE) $(LATE)"}
    - {name: LATE, valueFrom: {fileKeyRef: {volumeName: work, path: settings.env, key: LAST}}}
    volumeMounts: [{name: work, mountPath: /work}]
  volumes: [{name: work, emptyDir: {}}]
`,
			rewrite: `printf "# a comment\nKEY='after'\n MULTI='after\nline two' # more\nGONE= 'after'\nLAST='\$(KEY) after'\nNONE=''\n" | tee /work/settings.env >/work/sub/other.env`,
			want: map[string]string{"environment REFERENCES": "after $(GONE) $(LATE)",
				"environment MULTI": "after\nline two",
				"argument 3":        "after"},
		},
		{
			name: "host",
			spec: `
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    envFrom: [{configMapRef: {name: conf}}]
    env:
    - {name: HOST, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}
    - {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    - {name: IPS, valueFrom: {fieldRef: {fieldPath: status.podIPs}}}
`,
			want: map[string]string{"environment IP": bed.BridgeIP, "environment a": "after"},
		},
		{
			name: "sidecar",
			spec: `
  initContainers:
  - name: app
    image: BUSYBOX
    restartPolicy: Always
    command: [sh, -c, LOOP, "$(a)"]
    envFrom: [{configMapRef: {name: conf}}]
    env: [{name: LABEL, valueFrom: {fieldRef: {fieldPath: "metadata.labels['tier']"}}}]
    volumeMounts: [{name: conf, mountPath: /etc/setting, subPath: multi}]
  containers:
  - {name: main, image: BUSYBOX, command: [sh, -c, LOOP]}
  volumes: [{name: conf, configMap: {name: conf}}]
`,
			want: map[string]string{"environment LABEL": "after", "file /etc/setting": `"after\nline two\n"`},
		},
		{
			name: "configs",
			spec: `
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    volumeMounts:
    - {name: all, mountPath: /all, readOnly: true}
    - {name: some, mountPath: /some}
    - {name: some, mountPath: /renamed, subPath: deep/renamed}
    - {name: some, mountPath: /deep, subPath: deep}
    - {name: all, mountPath: /etc/app/multi, subPath: multi}
    - {name: all, mountPath: /etc/app/a, subPath: a, readOnly: true}
    - {name: appearing, mountPath: /appearing}
    - {name: vanishing, mountPath: /vanishing}
    - {name: all, mountPath: /by-key, subPathExpr: "$(KEY)"}
    env: [{name: KEY, valueFrom: {configMapKeyRef: {name: more, key: key, optional: true}}}, {name: KEY, value: a}]
  volumes:
  - {name: all, configMap: {name: conf, defaultMode: 0440}}
  - {name: some, configMap: {name: conf, items: [{key: a, path: deep/renamed, mode: 0400}, {key: multi, path: multi}]}}
  - {name: appearing, configMap: {name: appearing, optional: true}}
  - {name: vanishing, configMap: {name: vanishing, optional: true}}
`,
			want: map[string]string{"file /etc/app/multi": `"after\nline two\n"`, "file /renamed": "after",
				"file /deep/renamed": "after", "file /by-key": "after"},
		},
		{
			name: "secret-files",
			spec: `
  securityContext: {runAsUser: 1000, runAsGroup: 1001, fsGroup: 2000, supplementalGroups: [3000]}
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    volumeMounts:
    - {name: keys, mountPath: /keys}
    - {name: keys, mountPath: /home/user, subPath: user}
    - {name: keys, mountPath: /raw, subPath: raw, readOnly: true}
    - {name: work, mountPath: /work, subPath: made/by/kubelet}
    - {name: appearing, mountPath: /appearing}
  volumes:
  - {name: keys, secret: {secretName: keys, defaultMode: 0400}}
  - {name: appearing, secret: {secretName: appearing, optional: true}}
  - {name: work, emptyDir: {}}
`,
			want: map[string]string{"file /home/user": `0:2000 "user-after"`, "file /raw": `after\xff\xfe\x80`},
		},
		{
			name: "projected",
			spec: `
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    volumeMounts:
    - {name: all, mountPath: /all}
    - {name: all, mountPath: /token, subPath: token}
    - {name: all, mountPath: /part, subPath: part}
    - {name: all, mountPath: /note, subPath: part/note}
    - {name: all, mountPath: /secret, subPath: part/deep/secret}
  volumes:
  - name: all
    projected:
      defaultMode: 0444
      sources:
      - {serviceAccountToken: {path: token, audience: test, expirationSeconds: 3600}}
      - {configMap: {name: conf, items: [{key: a, path: part/conf}]}}
      - {configMap: {name: appearing, optional: true}}
      - {secret: {name: keys, items: [{key: user, path: part/deep/secret, mode: 0400}]}}
      - {downwardAPI: {items: [{path: part/note, fieldRef: {fieldPath: "metadata.annotations['note']"}}]}}
`,
			want: map[string]string{"file /note": "after", "file /secret": "user-after", "file /part/conf": "after",
				"file /token": "sha256"},
		},
		{
			name: "downward-files",
			spec: `
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    resources: {requests: {cpu: 100m, memory: 32Mi}, limits: {memory: 32Mi}}
    volumeMounts:
    - {name: all, mountPath: /all}
    - {name: all, mountPath: /labels, subPath: labels}
    - {name: all, mountPath: /deep, subPath: deep}
    - {name: all, mountPath: /memory, subPath: deep/memory}
  volumes:
  - name: all
    downwardAPI:
      items:
      - {path: labels, fieldRef: {fieldPath: metadata.labels}}
      - {path: deep/annotations, fieldRef: {fieldPath: metadata.annotations}}
      - {path: deep/uid, fieldRef: {fieldPath: metadata.uid}}
      - {path: deep/memory, resourceFieldRef: {containerName: app, resource: limits.memory, divisor: 1Mi}}
`,
			resize: `{"spec":{"containers":[{"name":"app","resources":{"requests":{"cpu":"100m","memory":"48Mi"},"limits":{"memory":"48Mi"}}}]}}`,
			want:   map[string]string{"file /labels": `tier=\"after\"`, "file /memory": `"48"`},
		},
		{
			name: "directories",
			spec: strings.NewReplacer("HOST", host).Replace(`
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    env:
    - {name: NOTE, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['note']"}}}
    - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: SETTING, valueFrom: {configMapKeyRef: {name: conf, key: a}}}
    - {name: LINK, value: link}
    volumeMounts:
    - {name: work, mountPath: /work}
    - {name: work, mountPath: /sub, subPath: made/by/kubelet}
    - {name: work, mountPath: /by-note, subPathExpr: "$(POD)/$(NOTE)"}
    - {name: work, mountPath: /by-link, subPathExpr: "$(LINK)"}
    - {name: work, mountPath: /plain, subPathExpr: "constant"}
    - {name: memory, mountPath: /memory}
    - {name: memory, mountPath: /memory-sub, subPathExpr: "$(SETTING)", readOnly: true}
    - {name: host, mountPath: /host, readOnly: true}
    - {name: host, mountPath: /host-sub, subPathExpr: "$(NOTE)/deep"}
    - {name: host, mountPath: /host-file, subPath: file}
    - {name: file, mountPath: /single}
    - {name: claim, mountPath: /claim}
    - {name: claim, mountPath: /claim-sub, subPathExpr: "$(POD)-$(SETTING)"}
    - {name: machine, mountPath: /machine, readOnly: true, recursiveReadOnly: IfPossible}
  initContainers:
  - name: setup
    image: BUSYBOX
    command: [sh, -c, "mkdir /work/one /work/two; echo one >/work/one/file; echo two >/work/two/file; ln -s one /work/link"]
    volumeMounts: [{name: work, mountPath: /work}]
  volumes:
  - {name: work, emptyDir: {}}
  - {name: memory, emptyDir: {medium: Memory, sizeLimit: 1Mi}}
  - {name: host, hostPath: {path: HOST/dir, type: Directory}}
  - {name: file, hostPath: {path: HOST/file, type: File}}
  - {name: machine, hostPath: {path: HOST/dir}}
  - {name: claim, persistentVolumeClaim: {claimName: claim}}
`),
			rewrite: `ln -sfn two /work/link; echo after >/work/made-by-app; echo after >/memory/file; echo after >/claim/file`,
			want: map[string]string{"file /by-link/file": "two", "mount /by-note": "/directories/after ",
				"mount /host-sub":   "/dir/after/deep ",
				"mount /memory-sub": "/after ro", "file /single": "after", "file /host-file": "after"},
		},
		{
			name: "images",
			spec: strings.NewReplacer("IMAGE", image, "PART", volumeImage).Replace(`
  containers:
  - name: app
    image: IMAGE
    imagePullPolicy: Always
    command: [sh, -c, LOOP]
    volumeMounts:
    - {name: always, mountPath: /always}
    - {name: always, mountPath: /part, subPath: etc}
    - {name: present, mountPath: /present, subPath: etc, readOnly: true}
  volumes:
  - {name: always, image: {reference: PART, pullPolicy: Always}}
  - {name: present, image: {reference: PART, pullPolicy: IfNotPresent}}
`),
			want: map[string]string{"image": "version 2.0", "file /part/version": "3.0",
				"file /always/etc/version": "3.0"},
		},
		{
			name: "locked",
			spec: `
  hostname: called
  subdomain: elsewhere
  hostAliases: [{ip: 192.0.2.1, hostnames: [alias]}]
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    workingDir: /tmp
    envFrom: [{configMapRef: {name: conf}}]
    resources: {limits: {cpu: 300m, memory: 32Mi}}
    securityContext:
      runAsUser: 1000
      runAsGroup: 1000
      readOnlyRootFilesystem: true
      allowPrivilegeEscalation: false
      capabilities: {drop: [ALL]}
      seccompProfile: {type: RuntimeDefault}
    volumeMounts: [{name: conf, mountPath: /tmp/conf, subPath: a}]
  volumes: [{name: conf, configMap: {name: conf}}]
`,
			want: map[string]string{"environment a": "after", "file /tmp/conf": "after", "working directory": "/tmp"},
		},
		{
			name: "message", // a volume where kubelet has its file for the last words too
			spec: strings.NewReplacer("HOST", host).Replace(`
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    terminationMessagePath: /log/last-words
    envFrom: [{configMapRef: {name: conf}}]
    volumeMounts:
    - {name: words, mountPath: /log/last-words}
    - {name: parent, mountPath: /parent}
  volumes:
  - {name: words, hostPath: {path: HOST/words/file, type: File}}
  - {name: parent, hostPath: {path: HOST/words, type: Directory}}
`),
			want: map[string]string{"environment a": "after", "file /parent/file": "after"},
		},
		{
			name: "key-gone", // kubelet makes a directory where there is nothing any more
			spec: `
  containers:
  - name: app
    image: BUSYBOX
    command: [sh, -c, LOOP]
    volumeMounts:
    - {name: conf, mountPath: /conf}
    - {name: conf, mountPath: /was-file, subPath: gone}
  volumes: [{name: conf, configMap: {name: conf}}]
`,
			want: map[string]string{"file /was-file": "d", "file /conf/a": "L"},
		},
	}
}

// TestSame restarts one container of each pod by a request, and again by kubelet itself, after
// everything that its spec refers to has changed. Both are equal in all that the process can see.
func TestSame(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	host := scratchDir(t)
	for _, dir := range []string{"dir", "words", "claim"} {
		must(t, os.Mkdir(filepath.Join(host, dir), 0o777))
	}
	files := []string{"file", "dir/file", "words/file"}
	write := func(what string) {
		for _, f := range files {
			must(t, os.WriteFile(filepath.Join(host, f), []byte(what), 0o666))
		}
	}
	write("before")
	image, volumeImage := moveTag(t, "same-moving:1", "busybox:1.0"), moveTag(t, "same-volume:1", "busybox:1.0")
	t.Cleanup(func() { // what does not go with the namespace
		if _, err := bed.Kubectl(context.Background(), "delete", "--wait=false", "--ignore-not-found", "pv/"+ns,
			"service/"+ns+"-elsewhere-80",
			"service/"+ns+"-elsewhere-8000"); err != nil {
			t.Error(err)
		}
	})
	apply(t, sources(ns, false)+services(ns, false)+fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolume
metadata: {name: %[1]s}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  claimRef: {namespace: %[1]s, name: claim}
  hostPath: {path: %[2]s/claim}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: claim, namespace: %[1]s}
spec: {storageClassName: "", volumeName: %[1]s, accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}
---
`, ns, host))
	cases := sameCases(host, image, volumeImage, ns)
	pods := ""
	for _, c := range cases {
		pods += c.pod(ns)
	}
	create(t, pods)
	first := allReady(t, ns)
	began := map[string]dump{}
	for _, c := range cases {
		began[c.name] = dumpOf(t, first[c.name], "app")
	}

	// Everything changes.
	moveTag(t, "same-moving:1", "busybox:2.0")
	moveTag(t, "same-volume:1", "busybox:3.0")
	write("after")
	kubectl(t, "-n", ns, "delete", "configmap/vanishing", "secret/vanishing", "service/old", "service/headless-80",
		"service/external-80")
	apply(t, sources(ns, true)+services(ns, true))
	for _, c := range cases {
		if c.resize != "" {
			kubectl(t, "-n", ns, "patch", "pod", c.name, "--subresource=resize", "-p", c.resize)
		}
		if c.rewrite != "" {
			kubectl(t, "-n", ns, "exec", c.name, "-c", "app", "--", "sh", "-c", c.rewrite)
		}
	}
	kubectl(t, "-n", ns, "label", "pods", "--all", "--overwrite", "tier=after", "fresh=after")
	kubectl(t, "-n", ns, "annotate", "pods", "--all", "--overwrite", "note=after",
		"quoted.key/with.dots=after\n\"quoted\"")
	shown(t, ns, first)
	before := allReady(t, ns)
	for _, c := range cases {
		if s := container(t, before[c.name], "app"); s.ContainerID != container(t, first[c.name], "app").ContainerID {
			t.Fatalf("container app of %s was restarted by the changes: %+v", c.name, s)
		}
	}

	// By requests.
	requests := ""
	for _, c := range cases {
		requests += recreate(ns, c.name, c.name, "containers: [{name: app}]")
	}
	apply(t, requests)
	byRequest, byKubelet, failures := map[string]dump{}, map[string]dump{}, map[string]string{}
	restarts := map[string]int32{}
	for _, c := range cases {
		crr := completed(t, ns, c.name)
		if failures[c.name] = outcome(crr); failures[c.name] != "" {
			continue
		}
		restarts[c.name] = 1
		before[c.name] = restarted(t, before[c.name], "app", 1)
		byRequest[c.name] = dumpOf(t, before[c.name], "app")
	}
	words, err := os.ReadDir(filepath.Join(host, "words"))
	must(t, err)

	// By kubelet.
	for _, c := range cases {
		before[c.name] = getPod(t, ns, c.name)
		restarts[c.name] = container(t, before[c.name], "app").RestartCount
		endProcess(t, before[c.name], "app")
	}
	for _, c := range cases {
		byKubelet[c.name] = dumpOf(t, restarted(t, before[c.name], "app", restarts[c.name]+1), "app")
	}

	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			for key, want := range c.want {
				if got := byKubelet[c.name][key]; !strings.Contains(got, want) {
					t.Errorf("the test is wrong: after a restart by kubelet %s is %q, want %q", key, got, want)
				}
			}
			if len(difference("", began[c.name], "", byKubelet[c.name])) == 0 {
				t.Error("the test is wrong: kubelet's restart changes nothing")
			}
			if f := failures[c.name]; f != "" {
				t.Fatalf("the request has failed, kubelet's own restart has not: %s", f)
			}
			if diff := difference("by request", byRequest[c.name], "by kubelet", byKubelet[c.name]); len(diff) > 0 {
				t.Errorf("a restart by request and one by kubelet differ in\n%s", strings.Join(diff, "\n"))
			}
			if c.name == "message" && len(words) != 1 {
				t.Errorf("beside the volume's file there are %v", words)
			}
		})
	}
}

// create creates objects, without the annotation that apply leaves.
func create(t testing.TB, documents string) {
	t.Helper()
	file := filepath.Join(scratchDir(t), "objects.yaml")
	must(t, os.WriteFile(file, []byte(documents), 0o600))
	kubectl(t, "create", "-f", file)
}

// shown waits until the volumes of all pods show nothing of before any more, and resizes are done.
// Kubelet looks at a pod's volumes whenever the pod changes, and else once a minute.
func shown(t testing.TB, ns string, pods map[string]*corev1.Pod) {
	t.Helper()
	var old []string
	round := 0
	eventuallySaying(t, "all volumes have been updated", func() string { return strings.Join(old, "\n") }, func() bool {
		old, round = nil, round+1
		for name, p := range pods {
			now := getPod(t, ns, name)
			for _, c := range now.Spec.Containers {
				s := container(t, now, c.Name)
				if s.Resources == nil {
					continue
				}
				for _, pair := range [][2]corev1.ResourceList{{c.Resources.Limits, s.Resources.Limits},
					{c.Resources.Requests, s.Resources.Requests}} {
					for resource, want := range pair[0] {
						if got := pair[1][resource]; got.Cmp(want) != 0 {
							old = append(old, fmt.Sprintf("%s/%s has %s %s, is to have %s", name, c.Name, resource,
								got.String(),
								want.String()))
						}
					}
				}
			}
			for _, plugin := range []string{"configmap", "secret", "projected", "downward-api"} {
				root := filepath.Join(bed.NodeDir, "kubelet", "pods", string(p.UID), "volumes", "kubernetes.io~"+plugin)
				_ = filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
					if err != nil || !e.Type().IsRegular() {
						return nil //nolint:nilerr // kubelet removes what it has replaced
					}
					if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), "before") {
						old = append(old, path)
					}
					return nil
				})
			}
		}
		slices.Sort(old)
		if len(old) > 0 {
			// But not the pod that has its annotations in a volume: they are to stay as they are
			// from here on.
			kubectl(t, "-n", ns, "annotate", "pods", "-l", "case!=downward-files", "--overwrite",
				fmt.Sprintf("left=%d-%d", round, len(old)))
		}
		return len(old) == 0
	})
}
