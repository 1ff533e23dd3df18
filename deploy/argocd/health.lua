-- How Argo CD tells the health of InPlaceRollouts, ContainerRecreateRequests, ImagePullJobs and ImageListPullJobs, from the
-- conditions that kstatus reads as well.
local hs = {status = "Progressing", message = "cri-controller has not seen it yet"}
local status = obj.status
if status == nil then
  return hs
end
if status.observedGeneration ~= nil and obj.metadata.generation ~= nil and status.observedGeneration ~= obj.metadata.generation then
  return hs
end
local known = false
for _, c in ipairs(status.conditions or {}) do
  if c.type == "Ready" or c.type == "Reconciling" or c.type == "Stalled" then
    known = true
    if c.status == "True" then
      hs.message = c.message
      if hs.message == nil or hs.message == "" then
        hs.message = status.message or c.reason
      end
      if c.type == "Ready" then
        hs.status = "Healthy"
      elseif c.type == "Stalled" then
        hs.status = "Degraded"
      elseif c.reason == "Paused" then
        hs.status = "Suspended"
      end
    end
  end
end
if not known and status.completionTime ~= nil then
  hs = {status = "Healthy", message = status.message} -- ended under another controller
end
return hs
