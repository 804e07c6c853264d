-- Spends tokens of a caller's two buckets, or of neither: gateway/policies/token_bucket.py, `take`, step by step.
--
-- KEYS[1]  the caller. Its value is "debt_minute debt_hour last_us", and it expires when both buckets are full.
-- ARGV     tokens and period in microseconds of the minute's bucket, then of the hour's (tokens < 0: no such bucket),
--          then the cost.
-- Returns  {1 if admitted, debt_minute, debt_hour, the moment they are true of, the time now}, in microseconds.
--
-- Every number stays a whole one below 2^53, which a double holds exactly. `..` would write only 14 digits of it.

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local cost = tonumber(ARGV[5])

local stored = redis.pcall('GET', KEYS[1])
if type(stored) == 'table' and not string.find(stored.err, 'WRONGTYPE', 1, true) then
  return stored  -- not allowed to look, say: else every bucket would seem full
end
-- a value of another type is no state: it is overwritten
local debt_minute, debt_hour, last
if type(stored) == 'string' then
  debt_minute, debt_hour, last = string.match(stored, '^(%d+) (%d+) (%d+)$')
end
local debts = {tonumber(debt_minute or 0), tonumber(debt_hour or 0)}
last = tonumber(last or 0)
local reached = math.max(now, last)

local admitted = 1
local full_in = 0
for i = 1, 2 do
  local tokens, period = tonumber(ARGV[2 * i - 1]), tonumber(ARGV[2 * i])
  if tokens < 0 then
    debts[i] = 0
  else
    local elapsed = math.min(math.max(0, now - last), period)
    debts[i] = math.max(0, math.min(debts[i], tokens * period) - elapsed * tokens)
    if debts[i] + cost * period > tokens * period then
      admitted = 0
    end
  end
end

if admitted == 1 and cost > 0 then
  for i = 1, 2 do
    local tokens, period = tonumber(ARGV[2 * i - 1]), tonumber(ARGV[2 * i])
    if tokens > 0 then
      debts[i] = debts[i] + cost * period
      full_in = math.max(full_in, debts[i] / tokens)
    end
  end
  -- The expiry is counted from the start of the script, a moment before TIME: one millisecond more than it needs.
  local expiry = math.ceil((reached - now + full_in) / 1000) + 1
  local state = string.format('%.0f %.0f %.0f', debts[1], debts[2], reached)
  redis.call('SET', KEYS[1], state, 'PX', string.format('%.0f', expiry))
end
return {admitted, debts[1], debts[2], reached, now}
